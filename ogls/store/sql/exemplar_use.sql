-- Exemplars that the teacher read, by round and pool: scored rollouts, exemplars per rollout, share with the reference.
SELECT run, round, pool, count(*) AS rollouts, avg(len(exemplars)) AS exemplars, min(len(exemplars)) AS fewest,
       max(len(exemplars)) AS most, avg(list_contains(exemplars, -1)::INT) AS with_reference
FROM contexts GROUP BY run, round, pool ORDER BY run, round, pool
