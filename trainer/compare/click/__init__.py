"""`compare hash` for click logs: a DLRM or DCN-v2 on all id features, its tables compressed by each method."""
