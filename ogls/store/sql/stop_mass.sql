-- Probability of the stop token at the end of rollouts: under the base pool, under the target, and in evaluation.
WITH trained AS (
    SELECT run, round, count(stop_base) AS rollouts, avg(stop_base) AS stop_base, avg(stop_target) AS stop_target
    FROM steered GROUP BY run, round
),
evaluated AS (SELECT run, round, stop_mass AS evaluated FROM summaries WHERE place = 0)
SELECT run, round, rollouts, stop_base, stop_target, evaluated
FROM trained FULL JOIN evaluated USING (run, round) ORDER BY run, round
