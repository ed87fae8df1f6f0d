"""Settings of the project, read by Kedro.

See https://docs.kedro.org/en/stable/configure/configuration_basics/ for all there are.
"""

from omegaconf.resolvers import oc

from .runtime import ConfigLoader, MlflowHook, random_name

# Tracks every run, as conf/<env>/mlflow.yml says.
HOOKS = (MlflowHook(),)

# Kedro's own, for runs that overlap in one process too, as in `kedro server start`.
CONFIG_LOADER_CLASS = ConfigLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    "config_patterns": {"mlflow": ["mlflow*.y*ml", "**/mlflow*.y*ml"]},
    # The mlflow.yml of an environment changes single keys of the one in conf/base.
    "merge_strategy": {"mlflow": "soft"},
    # What can stand in configuration files as ${oc.env:VARIABLE} and ${km.random_name:}.
    "custom_resolvers": {"oc.env": oc.env, "km.random_name": random_name},
}
