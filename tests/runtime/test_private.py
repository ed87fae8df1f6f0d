"""What the runtime uses of MLflow and Kedro that isn't public is there, and does what it should."""
