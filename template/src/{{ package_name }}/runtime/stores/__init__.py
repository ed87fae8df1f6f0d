"""Where runs are kept: the server, embedded stores, credentials, and what a store refuses."""
