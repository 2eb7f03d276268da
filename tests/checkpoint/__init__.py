"""What is proven about checkpoints, and by which test; `test_proofs.py` checks that all of these exist.

What a sceptic asks for:

    kill -9 of one rank or all, first saves and     test_killed.test_ranks_killed_at_random_moments,
      saves made again, on disks and on S3          test_killed.test_ranks_killed_at_random_moments_on_s3 (200 by scripts/torture_checkpoint.py)
      ... and that the check would see a mix        test_killed.test_the_check_finds_a_mix
    every region flipped: data, header, manifest    test_flips.test_every_flipped_bit_is_found (1,000 by the script),
      ... and named: file, bytes, tensor            test_flips.test_verify_names_every_damage_and_notes_what_is_sound,
                                                    test_damage.test_every_bit_of_the_data_is_covered,
                                                    test_damage.test_the_header_is_covered_by_the_digest_in_the_manifest,
                                                    test_manifest.test_the_digest_covers_every_bit
    cut, longer, empty, missing                     test_damage.test_a_wrong_size_makes_it_incomplete
    zeros at the end, other bytes                   test_odd_places.test_a_file_of_the_right_size_with_other_bytes
    files of two steps swapped                      test_damage.test_files_of_another_step_do_not_pass_for_its_own
    stale files, of other numbers of ranks          test_damage.test_stale_files_beside_are_not_looked_at,
                                                    test_flips.test_stale_files_of_another_world_size_are_not_looked_at
    N ranks to M, bit for bit                       test_many_ranks.test_saved_on_n_ranks_and_loaded_on_m,
                                                    test_many_ranks.test_whole_parameters_with_owners_come_back,
                                                    test_s3.test_n_ranks_to_m_over_s3
      ... and then as if never stopped              test_every_optimizer.test_goes_on_as_if_it_had_never_stopped (1 to 5 ranks),
                                                    test_sharded.test_saved_on_n_ranks_goes_on_on_m,
                                                    test_one_process.test_a_job_goes_on_as_if_it_had_never_stopped
      ... with schedule and rates                   test_losses_of_others.test_paddle_79804_and_simpletuner_3045_one_rank_reads_the_manifest_and_rates_come_back_everywhere,
                                                    test_one_process.test_schedules_come_back
      ... with random generators                    test_many_ranks.test_replicas_are_written_once_and_generators_are_each_ranks_own
      ... with data position and loss scaler        test_transfer.test_the_loss_scaler_and_the_position_in_the_data_come_back
    0-d, empty, tied, transposed, few rows,         test_every_optimizer.test_goes_on_as_if_it_had_never_stopped,
      every dtype                                   test_one_process.test_every_dtype_rank_and_layout_comes_back,
                                                    test_one_process.test_tied_tensors_are_saved_once_and_restored_to_all_names,
                                                    test_one_process.test_what_the_files_cannot_hold_is_named_and_nothing_is_written
    more than 2**31 elements                        test_odd_places.test_a_tensor_of_more_than_two_to_the_32_elements
    any name; very many tensors                     test_one_process.test_any_name_is_only_a_key, test_odd_places.test_ten_thousand_tensors
    frozen, then unfrozen                           test_sharded.test_saved_on_n_ranks_goes_on_on_m, test_checkpointer.test_frozen_parts_are_not_written_again
    a new head, groups fewer or cut otherwise       test_transfer.test_without_strict_what_does_not_fit_stays_and_is_listed,
                                                    test_transfer.test_groups_may_be_split_otherwise
    reordered; renamed by a map                     test_one_process.test_parameters_are_known_by_name_not_by_place,
                                                    test_losses_of_others.test_a_map_of_names_moves_a_checkpoint_to_another_model
    a rank that sees other names or hypers          test_many_ranks.test_ranks_that_disagree_all_hear_of_it
    one rank's disk full                            test_disk_full.test_a_file_that_one_rank_cannot_write_is_an_error_on_all,
                                                    test_surprises.test_a_disk_that_fills_up_at_any_write
    a refusal from S3 to one rank                   test_s3.test_a_store_that_refuses_one_rank_is_an_error_on_all,
                                                    test_s3.test_trouble_that_stays_fails_the_save_and_nothing_else
    an exception in staging                         test_checkpointer.test_ranks_save_in_the_background_and_hear_of_each_others_errors
    changes during a save do not leak in            test_checkpointer.test_the_loop_goes_on_and_its_changes_do_not_leak_in
    a second save while one runs                    test_checkpointer.test_one_save_at_a_time_in_one_buffer, test_surprises.test_threads_take_turns
    exit with a save in flight                      test_checkpointer.test_the_process_waits_for_a_save_before_it_ends
    memory: saving, loading, consolidating          test_pagecache.test_neither_saving_nor_loading_in_place_takes_memory,
                                                    test_checkpointer.test_what_does_not_fit_the_staging_memory_is_written_at_once,
                                                    test_cli.test_memory_is_bounded_however_large_a_tensor_is
    counted bytes                                   test_many_ranks.test_a_rank_reads_little_more_than_it_holds, test_many_ranks.test_every_rank_writes_its_share,
                                                    test_check_during.test_one_pass_reads_every_byte_once_and_into_place
    read-only; no right to list; wrong credentials  test_odd_places.test_a_storage_that_may_only_be_read_is_loaded_from,
                                                    test_odd_places.test_a_storage_that_may_not_be_listed_is_no_empty_one,
                                                    test_s3.test_wrong_credentials_are_no_empty_place
    hostile manifests, headers, values              test_manifest.test_a_hostile_manifest_is_refused, test_manifest.test_json_that_hides_something_is_refused,
                                                    test_fuzz.test_a_forged_manifest_loads_nothing_but_what_it_should,
                                                    test_fuzz.test_a_forged_header_changes_nothing_and_is_found,
                                                    test_fuzz.test_a_small_manifest_does_not_take_much_memory,
                                                    test_values.test_decoding_anything_gives_a_value_or_a_checkpoint_error
    safe_open, torch's reader, torch's merger       test_interop.test_safetensors_opens_every_file, test_interop.test_torch_reads_and_reshards_them,
                                                    test_interop.test_torch_merges_them
    the umask                                       test_storage.test_the_umask_is_respected
    what retention never removes                    test_retention.test_nothing_needed_goes, test_retention.test_what_is_used_by_what_stays_stays,
                                                    test_retention.test_an_incomplete_one_neither_counts_nor_goes
    older versions of the format                    test_versions.test_it_loads_bit_for_bit, test_versions.test_a_newer_version_is_refused_and_never_taken_for_damage

What users of other checkpoints have lost (the threads; most are about torch, or the project they name):

    189308  code in a pickle                        test_values.test_what_needs_pickle_is_refused_by_name
    163548, tnt 1064, accelerate 4105, Paddle 79804,
    169113  planning takes minutes                  test_plan.test_a_plan_for_many_ranks_is_quick_enough_to_be_used,
                                                    test_shards.test_a_thousand_ranks_are_a_few_rows,
                                                    test_losses_of_others.test_paddle_79804_and_simpletuner_3045_one_rank_reads_the_manifest_and_rates_come_back_everywhere
    76331, 125740  every rank reads everything      test_many_ranks.test_a_rank_reads_little_more_than_it_holds
    192202  states of frozen parameters dropped     distributed.test_more_complaints.test_pytorch_192202_the_state_of_frozen_parameters_is_saved
    140898  gradients that are there lose states    test_losses_of_others.test_pytorch_140898_gradients_that_are_there_are_left_alone_and_lose_no_state
    1489, 134107  known by place                    test_one_process.test_parameters_are_known_by_name_not_by_place
    192485, Automodel 301  numbers become 0         test_losses_of_others.test_pytorch_192485_consolidation_keeps_every_dtype_and_number
    Automodel 1093  consolidating needs a terabyte  test_cli.test_memory_is_bounded_however_large_a_tensor_is
    DeepSpeed 2898, 3810  another number of ranks   test_many_ranks.test_saved_on_n_ranks_and_loaded_on_m
    KempnerForge 102  the old one goes too early    test_losses_of_others.test_kempnerforge_102_nothing_goes_before_the_next_is_there
    speculators 739, metaseq 53  a name is trusted  test_losses_of_others.test_speculators_739_a_name_makes_no_checkpoint
    orbax 394  a copy is taken for temporary        test_losses_of_others.test_orbax_394_a_run_may_be_copied_and_moved
    marin 5386  the last good one is purged         test_retention.test_nothing_needed_goes, test_retention.test_a_load_that_has_read_everything_counts_as_verified
    torchtitan 909  all ranks purge                 test_many_ranks.test_only_the_first_rank_prunes
    170163  staging keeps a second copy             test_checkpointer.test_one_save_at_a_time_in_one_buffer
    radixark 61  staging has no memory              test_checkpointer.test_what_does_not_fit_the_staging_memory_is_written_at_once
    Megatron 1154  a rank is missing: hangs         test_many_ranks.test_a_rank_that_dies_is_an_error_on_the_others,
                                                    test_silent_ranks.test_a_rank_that_is_stopped_is_an_error_on_all
    transformers 48569  rank 0 alone saves: hangs   test_silent_ranks.test_a_save_that_not_all_ranks_call_says_so
    AReaL 1468  moments dropped in silence          distributed.test_more_complaints.test_areal_1468_moments_are_not_dropped_in_silence
    lightning 21499  slow streams to S3             test_s3.test_only_new_objects_are_put_and_none_is_copied
    safetensors 220  nothing is checked             test_odd_places.test_a_file_of_the_right_size_with_other_bytes
    TensorRT-LLM 17368  a mapping kills             test_pagecache.test_a_disk_that_cannot_read_what_was_in_the_cache_is_damage
    smart_open 684  half an object is published     test_losses_of_others.test_smart_open_684_an_exception_in_the_middle_publishes_nothing,
                                                    test_storage.test_an_error_while_writing_leaves_no_file
    148252, 132628  all or nothing by name          test_transfer.test_without_strict_what_does_not_fit_stays_and_is_listed
    SimpleTuner 3045  rates are not restored        test_one_process.test_schedules_come_back

What else is promised:

    bounded, aligned, self-describing files         test_one_process.test_files_are_bounded_and_aligned, test_one_process.test_the_files_explain_themselves,
                                                    test_interop.test_a_reader_written_from_the_document_finds_everything
    the folder is a Hugging Face checkpoint         test_interop.test_the_step_folder_is_a_hugging_face_checkpoint
    nothing is overwritten; one rule on all stores  test_storage.test_nothing_is_overwritten, test_storage.test_a_filesystem_without_links_publishes_too,
                                                    test_storage.test_a_filesystem_without_exclusive_put_publishes_too
    folders and files are synced                    test_storage.test_the_entry_of_every_new_folder_is_synced, test_surprises.test_a_filesystem_that_syncs_no_folders
    the one before is loaded, on every rank         test_transfer.test_a_damaged_checkpoint_is_replaced_by_the_one_before,
                                                    test_transfer.test_all_ranks_fall_back_together_and_say_so
    ... but not because of the network              test_s3.test_a_storage_out_of_reach_is_no_reason_to_go_on_with_an_older_checkpoint,
                                                    test_surprises.test_an_answer_that_ends_early_is_asked_for_again
    ... and a job does not begin anew               test_surprises.test_damage_is_no_reason_to_begin_anew
    errors in the background are told               test_checkpointer.test_an_error_is_logged_at_once_and_raised_by_the_next_call
    unchanged files are referred to                 test_checkpointer.test_frozen_parts_are_not_written_again, test_flips.test_nothing_is_taken_from_a_damaged_checkpoint
    nothing live changes unless all ranks load      test_many_ranks.test_a_load_that_fails_on_one_rank_changes_nothing_on_any,
                                                    test_misfits.test_an_optimizer_that_refuses_leaves_the_scheduler_and_itself,
                                                    test_surprises.test_live_tensors_that_nothing_can_be_stored_in_are_named
    any stage, one process, fully_shard, DTensors   test_sharded.test_one_process_to_sharded_and_back, test_sharded.test_dtensors_move_between_numbers_of_ranks,
                                                    test_fully_sharded.test_from_two_ranks_to_one_process_three_ranks_and_back,
                                                    test_fully_sharded.test_tensor_parallel_inside_data_parallel
    another dtype only when asked for               test_transfer.test_another_dtype_is_taken_only_when_asked_for
    leftovers are swept after a time                test_retention.test_leftovers_go_after_a_grace_time_whole_saves_together,
                                                    test_retention.test_ages_are_by_the_clock_of_the_storage
    trying again, and when not                      test_retries.test_what_may_pass_is_tried_again, test_retries.test_what_will_not_pass_is_raised_at_once
    state dicts by themselves                       test_state_dicts.test_a_sharded_state_dict_is_saved_and_opened_by_itself
    every command, exit code and sentence           test_cli_broken.test_every_command_has_an_answer, test_cli.test_mistakes_get_one_sentence
    two jobs in one place                           test_surprises.test_two_jobs_that_save_one_step_do_not_mix
    Ctrl-C                                          test_surprises.test_an_interrupted_wait_can_be_repeated,
                                                    test_surprises.test_an_interrupted_load_changes_nothing_or_says_so,
                                                    test_surprises.test_an_interrupted_save_leaves_nothing
    what could not be read again is not written     test_surprises.test_what_could_not_be_read_again_is_not_written
    going back to an earlier step                   test_losses_of_others.test_a_job_that_goes_back_keeps_what_it_saves_and_is_warned
    pruned while it is loaded                       test_losses_of_others.test_a_checkpoint_that_is_pruned_while_it_is_loaded_is_replaced_by_a_newer_one
    tied here, not tied there                       test_transfer.test_a_tied_tensor_gets_one_of_two_that_were_not
    any default device; several GPUs                test_surprises.test_the_default_device_of_a_program_does_not_matter,
                                                    test_staging.test_every_gpu_that_is_copied_from_is_waited_for
    clocks that jump                                test_retention.test_a_clock_that_has_jumped_makes_no_running_save_old
    late listings, as of NFS                        test_surprises.test_what_appears_late_in_a_listing_is_waited_for
    a server that is away for a moment, or long     test_corners.test_a_server_that_was_away_for_a_moment_is_no_damage, test_corners.test_a_folder_out_of_reach_is_no_empty_one,
                                                    test_retries.test_a_storage_that_never_answers_is_given_up
    links, and paths that look like URLs            test_corners.test_a_step_that_lies_elsewhere_behind_a_link, test_corners.test_links_that_lead_nowhere_are_not_ours,
                                                    test_corners.test_what_is_no_url_is_a_path
    forks and handlers of signals during a save     test_corners.test_a_worker_that_is_forked_during_a_save_ends,
                                                    test_corners.test_a_save_in_the_middle_of_a_save_is_refused
    ranks in different numbers of groups            test_corners.test_ranks_may_be_in_different_numbers_of_groups
    ranks whose schedules or loss scales differ     test_corners.test_ranks_that_disagree_on_schedule_or_loss_scale_hear_of_it
    extra changes during a save                     test_corners.test_changes_of_extra_do_not_leak_in
    a damaged file that several checkpoints use     test_corners.test_nothing_is_taken_from_a_file_found_damaged_by_way_of_another_checkpoint
    a failed save over a damaged checkpoint         test_corners.test_a_save_that_fails_leaves_a_damaged_checkpoint_of_its_step_as_it_was
    activation checkpointing, tensors of tensors    test_corners.test_activation_checkpointing_may_be_switched_on_or_off,
                                                    test_corners.test_a_tensor_that_is_made_of_others_is_named_before_anything_changes
    the benchmark measures what it says             scripts.test_bench_checkpoint.test_everybody_has_saved_and_loaded
"""  # noqa: E501
