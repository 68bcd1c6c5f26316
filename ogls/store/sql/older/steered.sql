-- The table `steered`, computed from targets that a release before schema version 3 wrote.
SELECT run, round, problem_id, sample, count(*)::INTEGER AS tokens, avg(kl) AS kl, max(kl) AS kl_max,
       arg_max(position, kl) AS kl_max_position, avg(token_target_logprob - token_base_logprob) AS gain,
       avg(direction_norm) AS direction_norm, max(direction_norm) AS direction_max,
       arg_max(position, direction_norm) AS direction_max_position
FROM ({targets}) GROUP BY run, round, problem_id, sample
