"""What is proven about sharding, and by which test; `test_complaints.py` checks that all of these exist.

Complaints of users of other sharded optimizers, by their number in our list (the threads are in the names and the
docstrings of the tests):

     1  unfreezing after a forward that was all frozen      test_complaints.unfreezes_after_a_frozen_forward
     2  frozen at first, then unfrozen: does not learn      test_complaints.frozen_at_first
     3  a group in which nothing trains                     test_complaints.groups_without_parameters,
                                                            test_more_complaints.test_deepspeed_4055_a_group_in_which_nothing_trains
     4  states of what is frozen take memory                test_complaints.frozen_at_first
     5  the state of frozen parameters is lost              test_complaints.frozen_in_the_middle,
                                                            test_more_complaints.test_pytorch_192202_the_state_of_frozen_parameters_is_saved
     6  resuming freezes again                              test_more_complaints.test_lightning_21901_resuming_does_not_freeze_again
     7  frozen parameters move                              test_complaints.frozen_in_the_middle
     8  unused on one rank: hangs                           test_complaints.unused_on_one_rank
     9  consolidating runs out of memory                    test_more_complaints.test_pytorch_68181_saving_brings_no_state_together
    10  resuming on another number of ranks is refused      test_more_complaints.test_pytorch_65650_and_megatron_659_resuming_on_other_numbers_of_ranks
    11  ... works for some numbers of ranks only            test_more_complaints.test_pytorch_65650_and_megatron_659_resuming_on_other_numbers_of_ranks
    12  loading drops moments in silence                    test_more_complaints.test_areal_1468_moments_are_not_dropped_in_silence
    13  groups lose their hypers                            test_complaints.hypers_of_groups
    14  many groups are slow                                test_more_complaints.test_deepspeed_2125_many_groups_cost_what_one_costs,
                                                            test_wire.test_complaint_14_and_16_many_groups_cost_what_one_costs_and_nothing_is_all_reduced
    15  steps on DTensors are bound by the host             test_complaints.plain_tensors
    16  all-reduces where a reduce-scatter is promised      test_more_complaints.test_deepspeed_5758_no_all_reduce_where_a_reduce_scatter_is_promised
    17  norms of layers are those of slices                 test_complaints.norms_of_layers
    18  the norm of all gradients is that of a shard        test_complaints.norm_of_the_whole
    19  rates that differ between ranks                     test_complaints.test_complaint_19_hypers_that_differ,
                                                            test_tensor_parallel.test_rates_that_differ_along_the_plan_are_told_after_some_steps
    20  groups in another order on some rank                test_complaints.test_complaint_20_groups_in_another_order
    21  tied weights, uneven shards                         test_complaints.tied_and_uneven
    22  an inf on one rank, a rank without elements         test_precision.test_complaint_22_inf_on_one_rank_skips_the_step_on_all,
                                                            test_precision.test_complaint_22_ranks_without_elements_or_gradients,
                                                            test_more_complaints.test_fairscale_180_and_pytorch_99174_ranks_without_elements_and_inf_on_one
    23  global shapes of uneven shards are guessed          test_more_complaints.test_miles_credit_416_states_of_uneven_shards_know_their_global_shape
    24  starting takes minutes, memory and host time        test_complaints.starting, test_memory.test_bytes_alive_are_those_of_the_formula

What else is promised, over Gloo and, on GPUs, over NCCL:

    parity of every optimizer, stage, number of ranks, groups, freezing
                                test_parity.test_every_optimizer, gpu.test_nccl.test_every_optimizer
    ... with accumulation       test_gradients.test_passes_add_up_whatever_was_synchronised
    ... with clipping           test_gradients.test_clipping_equals_torchs_on_the_averaged_gradients,
                                gpu.test_nccl.test_backward_with_clipping
    ... with other dtypes       test_precision.test_masters_are_slices_and_equal_one_process,
                                test_precision.test_accumulation_in_float32, gpu.test_overlap.test_grad_scaler
    ... on meshes               test_meshes.test_a_mesh_equals_one_process, gpu.test_meshes.test_hybrid_sharding_equals_one_process,
                                test_tensor_parallel.test_it_equals_one_process, gpu.test_tensor_parallel.test_it_equals_one_process
    ... with copies             test_meshes.test_copies_inside_a_hybrid_mesh_are_waited_for, gpu.test_copying.test_training_has_the_bits_of_nccl
    ... with overlap            gpu.test_overlap.test_freezing_with_overlap_equals_one_process
    memory within 1 %           test_memory.test_bytes_alive_are_those_of_the_formula, gpu.test_overlap.test_memory_is_that_of_the_formula
    overlap, from profiles      test_wire.test_buckets_are_reduced_while_backward_goes_on,
                                gpu.test_overlap.test_collectives_run_beside_matrix_products
    hundreds of random steps    test_stress.test_anything (FASTOPT_STRESS_STEPS=500), gpu.test_stress.test_anything (500)
    the wire, byte by byte      test_wire.test_a_step_is_one_reduce_scatter_and_one_all_gather_per_bucket
"""  # noqa: E501
