"""The course's exercises, which check themselves, and a look at whether this machine is ready for it.

One file a lesson: `lesson_02.py` judges the exercises 02.1, 02.2 and so on.
"""

from lora_nb.checks.exercises import CheckResult, Exercise, Mistake, NotSolved, check, exercise, exercises, value_of
from lora_nb.checks.readiness import Readiness, readiness

__all__ = ["CheckResult", "Exercise", "Mistake", "NotSolved", "Readiness", "check", "exercise", "exercises", "readiness", "value_of"]
