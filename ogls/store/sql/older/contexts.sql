-- The table contexts of rounds that a release before schema version 3 wrote, from their states.
SELECT run, round, problem_id, sample, pool, exemplars FROM ({teacher_states})
