"""The control plane of raylaunch: what sits on the user's machine. It never imports torch, ray or timm."""

__version__ = "0.1.0"
