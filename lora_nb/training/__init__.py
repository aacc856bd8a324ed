"""Training and evaluation: the loop in `loop.py`, what it minimises in `loss.py`, how it steps in `optim.py`."""
