"""Artifacts of the stages, with checked manifests: factors and id maps."""
