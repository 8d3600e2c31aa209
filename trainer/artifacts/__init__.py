"""What stages write and read: factors and id maps, with manifests that are checked."""
