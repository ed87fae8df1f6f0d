"""Steps of the first pipeline."""


def first_step(greeting: str) -> str:
    """Stand here until the project has a step of its own."""
    return f"{greeting}, world"
