-- Learned and forgotten problems: first, last, best and worst accuracy on each benchmark problem.
WITH by_round AS (
    SELECT run, benchmark, problem_id, round, avg((verdict = 'correct')::INT) AS accuracy
    FROM scores WHERE NOT greedy GROUP BY run, benchmark, problem_id, round
),
by_problem AS (
    SELECT run, benchmark, problem_id, arg_min(accuracy, round) AS first, arg_max(accuracy, round) AS last,
           max(accuracy) AS best, min(accuracy) AS worst
    FROM by_round GROUP BY run, benchmark, problem_id
)
SELECT run, benchmark, problem_id, first, last, best, worst,
       CASE WHEN first < 0.5 AND last >= 0.5 THEN 'learned'
            WHEN first >= 0.5 AND last < 0.5 THEN 'forgotten'
            WHEN last >= 0.5 THEN 'known' ELSE 'unsolved' END AS state
FROM by_problem ORDER BY run, benchmark, last - first, problem_id
