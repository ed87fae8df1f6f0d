"""Why a validator in catalog.yml has refused data, in tags without the data itself."""

from __future__ import annotations

from dataclasses import replace

from ..stores.errors import causes_of


def tags_of_refusal(error: BaseException) -> dict[str, str]:
    """Return the tags of a run for data that a validator has refused; none for other errors.

    Kedro's own message has values of the data as examples, and a tag is for everybody to read.
    """
    try:
        from kedro.validation import DataValidationError
    except ImportError:  # Kedro before 1.6 has no validators
        return {}
    refusals = (cause for cause in causes_of(error) if isinstance(cause, DataValidationError))
    if (refusal := next(refusals, None)) is None:
        return {}
    # Without the name of a check the message is the library's, which may show data too.
    failures = [
        replace(failure, check=failure.check or "schema", failure_examples=[])
        for failure in refusal.failures
    ]
    shown = DataValidationError(
        refusal.message,
        dataset_name=refusal.dataset_name,
        mode=refusal.mode,
        validator=refusal.validator,
        failures=failures,
    )
    checks = [" ".join(filter(None, (each.column, each.check))) for each in failures]
    tags = {
        "kedro_error": f"{type(refusal).__name__}: {shown}",
        "kedro_failed_dataset": refusal.dataset_name,
        "kedro_failed_rule": ": ".join(filter(None, (refusal.validator, ", ".join(checks)))),
    }
    return {name: text for name, text in tags.items() if text}
