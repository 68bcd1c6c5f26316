-- Rollouts that the targets change most: mean KL(target || base), its maximum with position, and the outcome.
SELECT run, round, problem_id, sample, outcome, tokens, kl, kl_max, kl_max_position, gain, direction_norm
FROM (FROM steered ORDER BY kl DESC LIMIT 50) JOIN verdicts USING (run, round, problem_id, sample)
ORDER BY kl DESC, run, round, problem_id, sample
