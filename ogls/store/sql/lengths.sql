-- Length of training rollouts in tokens, by round and outcome.
SELECT run, round, outcome, count(*) AS rollouts, avg(n_tokens) AS mean_length,
       quantile_cont(n_tokens, 0.5) AS p50, quantile_cont(n_tokens, 0.95) AS p95,
       avg((finish_reason = 'length')::INT) AS truncated
FROM trajectories JOIN verdicts USING (run, round, problem_id, sample)
GROUP BY ALL ORDER BY run, round, outcome
