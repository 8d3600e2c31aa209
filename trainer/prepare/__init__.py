"""The stages that write logs, and logs that are read without their damaged parts."""
