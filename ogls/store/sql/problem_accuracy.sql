-- Accuracy by problem and round: the share of correct rollouts in the group.
SELECT run, problem_id, round, count(*) AS rollouts, avg((outcome = 'correct')::INT) AS accuracy
FROM verdicts GROUP BY run, problem_id, round ORDER BY run, problem_id, round
