"""The one exception that means "the user can fix this".

Scripts print its message as a single line and exit with code 2; anything else is a
bug and keeps its traceback.
"""


class UserError(ValueError):
    """A request that cannot be served; the message names the value and the remedy."""
