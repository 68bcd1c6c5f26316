-- Accuracy by problem and round: the share of a group's rollouts that is correct.
SELECT run, problem_id, round, count(*) AS rollouts, avg((outcome = 'correct')::INT) AS accuracy
FROM verdicts GROUP BY run, problem_id, round ORDER BY run, problem_id, round
