"""Every use of something of MLflow that isn't public.

Each function says why there is no public way, and the version of MLflow that it was seen in; a
test named after it (tests/runtime/test_private.py) fails when MLflow has it no more.
"""
