-- Training curve: evaluation on the first benchmark and number of mixed groups, by run and round.
WITH groups AS (
    SELECT run, round, problem_id,
           bool_or(outcome = 'correct') AND bool_or(outcome = 'failed') AS mixed
    FROM verdicts GROUP BY ALL
),
mixed AS (SELECT run, round, count(*) FILTER (mixed) AS mixed_groups FROM groups GROUP BY ALL)
SELECT run, round, accuracy, accuracy_low, accuracy_high, greedy_accuracy, mean_length, truncated, mixed_groups
FROM (FROM summaries WHERE place = 0) FULL JOIN mixed USING (run, round)
ORDER BY run, round
