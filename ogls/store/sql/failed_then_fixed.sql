-- Failed rollouts of problems with accuracy below 0.5 in that round and above 0.5 in the next round that sampled them.
WITH by_round AS (
    SELECT run, problem_id, round, avg((outcome = 'correct')::INT) AS accuracy
    FROM verdicts GROUP BY run, problem_id, round
),
followed AS (
    SELECT *, lead(accuracy) OVER later AS next_accuracy, lead(round) OVER later AS next_round
    FROM by_round WINDOW later AS (PARTITION BY run, problem_id ORDER BY round)
)
SELECT run, round, problem_id, sample, verdict, accuracy, next_round, next_accuracy
FROM (FROM followed WHERE accuracy < 0.5 AND next_accuracy > 0.5) JOIN verdicts USING (run, round, problem_id)
WHERE outcome = 'failed' ORDER BY next_accuracy - accuracy DESC, run, round, problem_id, sample LIMIT 50
