"""What a notebook sees: magics, control panel, live charts."""
