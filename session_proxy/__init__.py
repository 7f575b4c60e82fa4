"""session-proxy: the sidecar between a runner that holds no credential and the workspace pod it may run commands in."""

__version__ = "0.1.0"
