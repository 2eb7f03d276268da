"""What sharding will cost, and who will own what, computed without ranks: the insides of `fastopt.distributed.plan`."""
