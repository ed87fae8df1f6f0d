"""Every use of something of Kedro, or of Kedro's datasets, that isn't public.

Each function says why there is no public way, and the version that it was seen in; a test named
after it (tests/runtime/test_private.py) fails when it is there no more.
"""
