-- Number of groups per round with both outcomes, only correct rollouts or only failed rollouts.
WITH groups AS (
    SELECT run, round, problem_id,
           bool_or(outcome = 'correct') AS any_correct, bool_or(outcome = 'failed') AS any_failed
    FROM verdicts GROUP BY ALL
)
SELECT run, round, count(*) AS groups,
       count(*) FILTER (any_correct AND any_failed) AS mixed,
       count(*) FILTER (any_correct AND NOT any_failed) AS only_correct,
       count(*) FILTER (any_failed AND NOT any_correct) AS only_failed,
       count(*) FILTER (NOT any_correct AND NOT any_failed) AS undecided
FROM groups GROUP BY run, round ORDER BY run, round
