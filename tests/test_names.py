from ditty_di.names import canonical_fqn


def test_whole_segments_of_wrappers_are_dropped_and_nothing_else():
    assert canonical_fqn("layers.0._checkpoint_wrapped_module.w._orig_mod.b") == "layers.0.w.b"
    assert canonical_fqn("my_orig_mod.lm_head.weight") == "my_orig_mod.lm_head.weight"
