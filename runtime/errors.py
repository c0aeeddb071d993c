"""Errors that a user can act on. Command lines print them as one line; services can catch them by class."""


class InputError(ValueError):
    """Something given by the user does not fit: the message says what, what is allowed and what to do."""


class EngineFileError(InputError):
    """An engine file, or a file beside it, is missing, damaged, or of a version that this runtime cannot read."""


class PromptTooLongError(InputError):
    """The prompt leaves no room for a single new token within the engine's context limit."""


class InputWarning(UserWarning):
    """Something given by the user works, and likely not as it was meant. Command lines show it as one line."""
