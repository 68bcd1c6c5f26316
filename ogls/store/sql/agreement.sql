-- Agreement within groups: share of the most frequent answer, different answers, accuracy of the majority answer.
WITH answers AS (
    SELECT run, round, problem_id, answer, count(*) AS times, sum((outcome = 'correct')::INT) AS correct
    FROM verdicts GROUP BY run, round, problem_id, answer
),
groups AS (
    SELECT run, round, problem_id, sum(times) AS rollouts, max(times) FILTER (answer IS NOT NULL) AS most,
           count(answer) AS different, arg_max(correct / times, (answer IS NOT NULL, times)) AS majority,
           sum(correct) AS correct
    FROM answers GROUP BY run, round, problem_id
)
SELECT run, round, count(*) AS groups, avg(coalesce(most, 0) / rollouts) AS agreement, avg(different) AS answers,
       sum(correct) / sum(rollouts) AS accuracy, avg(majority) AS majority_accuracy
FROM groups GROUP BY run, round ORDER BY run, round
