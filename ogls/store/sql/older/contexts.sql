-- The table `contexts`, computed from teacher states that a release before schema version 3 wrote.
SELECT run, round, problem_id, sample, pool, exemplars FROM ({teacher_states})
