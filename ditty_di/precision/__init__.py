"""Transforms for `trainer.convert`: linear layers that multiply in 8-bit floating point.

bfloat16 and float16 need none: they are `param_dtype` of `ditty_di.parallelize.data_parallel.shard`
(see conf/precision).
"""
