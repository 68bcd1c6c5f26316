-- Where the target first lowers a token by train.mistake_nats, by verdict.
SELECT run, round, verdict, count(*) AS rollouts, count(first_mistake) / count(*) AS with_mistake,
       avg(first_mistake) AS position, avg((first_mistake + 1) / tokens) AS share_before, avg(tokens) AS tokens
FROM steered JOIN verdicts USING (run, round, problem_id, sample)
GROUP BY run, round, verdict ORDER BY run, round, verdict
