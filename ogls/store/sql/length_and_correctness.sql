-- Accuracy of training rollouts by decile of their length, shortest first.
WITH by_length AS (
    SELECT run, n_tokens, count(*) AS rollouts, count(*) FILTER (outcome = 'correct') AS correct
    FROM trajectories JOIN verdicts USING (run, round, problem_id, sample) GROUP BY run, n_tokens
),
placed AS (
    SELECT *, floor(10 * (sum(rollouts) OVER (PARTITION BY run ORDER BY n_tokens) - rollouts / 2)
                    / sum(rollouts) OVER (PARTITION BY run)) + 1 AS tenth
    FROM by_length
)
SELECT run, tenth::INT AS tenth, min(n_tokens) AS shortest, max(n_tokens) AS longest, sum(rollouts)::BIGINT AS rollouts,
       sum(correct) / sum(rollouts) AS accuracy
FROM placed GROUP BY run, tenth ORDER BY run, tenth
