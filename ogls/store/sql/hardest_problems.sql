-- Training problems with the lowest accuracy over all rounds.
SELECT run, problem_id, count(*) AS rollouts, avg((outcome = 'correct')::INT) AS solved,
       max(round) AS last_round, any_value(problem) AS problem
FROM verdicts JOIN (FROM problems SELECT run, problem_id, problem WHERE split = 'train') USING (run, problem_id)
GROUP BY run, problem_id ORDER BY solved, rollouts DESC, run, problem_id LIMIT 50
