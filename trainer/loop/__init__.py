"""The train loop, for any sharded model: steps, optimizer, stopping, what a checkpoint holds."""
