from given import model  # noqa: F401
