"""The sharded two-tower network: tables placed by TorchRec's planner, weights, vectors."""
