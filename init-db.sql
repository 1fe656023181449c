-- The tables of the activity pipeline, for Postgres 13 and later. Running this again changes
-- nothing: psql "$ACTIVITY_DATABASE_URL" -f init-db.sql

-- Page views per page and window (a minute, unless the pipeline is told otherwise).
CREATE TABLE IF NOT EXISTS page_view_counts (
    window_start timestamptz NOT NULL,
    window_end timestamptz NOT NULL,
    page_url text NOT NULL,
    views bigint NOT NULL,
    -- Top pages of an interval:
    --   SELECT page_url, sum(views) AS views FROM page_view_counts
    --   WHERE window_start >= now() - interval '1 hour' GROUP BY page_url
    --   ORDER BY views DESC LIMIT 10;
    PRIMARY KEY (window_start, window_end, page_url)
);

-- The rows of an open window are updated every few seconds. With room left in their pages,
-- and no index on views, Postgres updates them in place.
ALTER TABLE page_view_counts SET (fillfactor = 70);

-- Different users per sliding window (5 minutes every minute), estimated.
CREATE TABLE IF NOT EXISTS active_users (
    window_start timestamptz NOT NULL,
    window_end timestamptz NOT NULL,
    active_users bigint NOT NULL,
    -- Users now (of the last five minutes; a window that began later is not yet whole):
    --   SELECT * FROM active_users WHERE window_start <= now() - interval '4 minutes'
    --   ORDER BY window_start DESC LIMIT 1;
    PRIMARY KEY (window_start, window_end)
);

-- Sessions that have ended, each stored once.
CREATE TABLE IF NOT EXISTS user_sessions (
    user_id text NOT NULL,
    session_start timestamptz NOT NULL,
    session_end timestamptz NOT NULL,
    duration_s double precision NOT NULL,
    page_views bigint NOT NULL,
    clicks bigint NOT NULL,
    ended_by text NOT NULL, -- session_end or timeout
    -- Sessions of a user, the latest first:
    --   SELECT * FROM user_sessions WHERE user_id = 'u-1' ORDER BY session_start DESC;
    PRIMARY KEY (user_id, session_start)
);

-- Recent sessions of everybody. They are stored in the order of their ends, minute by minute: an
-- index of the least and greatest end of each 128 pages finds them, and takes next to nothing to
-- keep. A B-tree here would double what a row takes of the server.
--   SELECT * FROM user_sessions WHERE session_end >= now() - interval '10 minutes'
--   ORDER BY session_end DESC LIMIT 20;
CREATE INDEX IF NOT EXISTS user_sessions_session_end ON user_sessions
  USING brin (session_end) WITH (autosummarize = on);
