-- The activity job in Flink SQL 1.19, without external sinks. $names are filled in by
-- `python -m bench.peers.flink_sql`. Tuned by Flink's own guide:
-- https://nightlies.apache.org/flink/flink-docs-release-1.19/docs/dev/table/tuning/
SET 'pipeline.name' = '$job_name';
SET 'execution.checkpointing.interval' = '10 s';
SET 'parallelism.default' = '$parallelism';
SET 'pipeline.object-reuse' = 'true';
SET 'table.exec.mini-batch.enabled' = 'true';
SET 'table.exec.mini-batch.allow-latency' = '1 s';
SET 'table.exec.mini-batch.size' = '5000';
SET 'table.optimizer.agg-phase-strategy' = 'TWO_PHASE';
-- One deduplication for all results: else each INSERT plans its own.
SET 'table.optimizer.reuse-optimize-block-with-digest-enabled' = 'true';
SET 'table.optimizer.distinct-agg.split.enabled' = 'true';
-- Ids are remembered for as long as a record may be sent again and still count.
SET 'table.exec.state.ttl' = '10 min';
SET 'table.exec.source.idle-timeout' = '5 s';
SET 'table.local-time-zone' = 'UTC';

CREATE TEMPORARY TABLE user_activity (
  event_id STRING,
  event_time TIMESTAMP_LTZ(3),
  user_id STRING,
  page_url STRING,
  event_type STRING,
  append_time TIMESTAMP_LTZ(3) METADATA FROM 'timestamp' VIRTUAL,
  arrival AS PROCTIME(),
  -- What counts: no more than 2 + 2 minutes late, no more than 5 minutes ahead. The
  -- watermark must not see other times, nor none.
  usable AS event_id IS NOT NULL AND user_id IS NOT NULL AND page_url IS NOT NULL
    AND event_type IN ('page_view', 'click', 'session_start', 'session_end')
    AND event_time >= append_time - INTERVAL '4' MINUTE
    AND event_time <= append_time + INTERVAL '5' MINUTE,
  ts AS CASE
    WHEN event_time >= append_time - INTERVAL '4' MINUTE
      AND event_time <= append_time + INTERVAL '5' MINUTE THEN event_time
    ELSE append_time - INTERVAL '4' MINUTE
  END,
  WATERMARK FOR ts AS ts - INTERVAL '4' MINUTE
) WITH (
  'connector' = 'kafka',
  'topic' = '$topic',
  'properties.bootstrap.servers' = '$bootstrap_servers',
  'properties.group.id' = 'flink-sql',
  'scan.startup.mode' = 'earliest-offset',
  'format' = 'json',
  'json.timestamp-format.standard' = 'ISO-8601',
  'json.ignore-parse-errors' = 'true'
);

CREATE TEMPORARY VIEW events AS
SELECT event_id, ts, user_id, page_url, event_type
FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY event_id ORDER BY arrival) AS copy
  FROM user_activity
  WHERE usable
)
WHERE copy = 1;

CREATE TEMPORARY TABLE enriched (
  event_id STRING, ts TIMESTAMP_LTZ(3), user_id STRING, page_url STRING, event_type STRING
) WITH ('connector' = 'blackhole');

CREATE TEMPORARY TABLE page_view_counts (
  window_start TIMESTAMP(3), window_end TIMESTAMP(3), page_url STRING, page_views BIGINT
) WITH ('connector' = 'blackhole');

CREATE TEMPORARY TABLE active_users (
  window_start TIMESTAMP(3), window_end TIMESTAMP(3), active_users BIGINT
) WITH ('connector' = 'blackhole');

CREATE TEMPORARY TABLE user_sessions (
  user_id STRING, session_start TIMESTAMP(3), session_end TIMESTAMP(3),
  page_views BIGINT, clicks BIGINT
) WITH ('connector' = 'blackhole');

EXECUTE STATEMENT SET BEGIN

INSERT INTO enriched SELECT event_id, ts, user_id, page_url, event_type FROM events;

INSERT INTO page_view_counts
SELECT window_start, window_end, page_url, COUNT(*)
FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(ts), INTERVAL '1' MINUTE))
WHERE event_type = 'page_view'
GROUP BY window_start, window_end, page_url;

INSERT INTO active_users
SELECT window_start, window_end, COUNT(DISTINCT user_id)
FROM TABLE(HOP(TABLE events, DESCRIPTOR(ts), INTERVAL '1' MINUTE, INTERVAL '5' MINUTE))
GROUP BY window_start, window_end;

INSERT INTO user_sessions
SELECT user_id, window_start, window_end,
  COUNT(*) FILTER (WHERE event_type = 'page_view'),
  COUNT(*) FILTER (WHERE event_type = 'click')
FROM TABLE(SESSION(TABLE events PARTITION BY user_id, DESCRIPTOR(ts), INTERVAL '30' MINUTE))
GROUP BY window_start, window_end, user_id;

END;
