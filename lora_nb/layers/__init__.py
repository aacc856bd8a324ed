"""The maths: one method a file, torch only."""
