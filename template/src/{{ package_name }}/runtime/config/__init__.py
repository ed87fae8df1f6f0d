"""`mlflow.yml`: its keys, how it is read, and the URIs in it."""
