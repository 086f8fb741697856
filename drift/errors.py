"""The one exception that stands for a user's mistake.

Everything else that escapes the library is a defect and keeps its traceback.
"""


class InputError(ValueError):
    """Bad input; the message is one line that names what is wrong and where."""
