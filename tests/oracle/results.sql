-- judged → what a run over these records must leave behind. Times are µs since 1970. The
-- durations are variables: out_of_orderness_us, allowed_lateness_us, future_tolerance_us,
-- as_of_us, window_us, users_window_us, users_period_us, session_gap_us; dedupe is
-- event_id, payload, coordinates or none.

CREATE MACRO floored(us, step) AS us - ((us % step) + step) % step;

-- A text in a table: over 2,000 bytes, or where it contains the mark of one that was, its
-- beginning (whole characters, of 1,926 bytes at most), the mark and its SHA-256. A byte whose
-- first hexadecimal digit is 8 to B goes on with a character.
CREATE MACRO beginning(digits, bytes) AS substr(digits, 1, 2 * list_filter(
    [bytes, bytes - 1, bytes - 2, bytes - 3],
    lambda n: substr(digits, 2 * n + 1, 1) NOT IN ('8', '9', 'A', 'B')
)[1]);
CREATE MACRO shortened(text) AS
    CASE
        WHEN octet_length(encode(text)) > 2000 OR contains(text, '…sha256:')
            THEN decode(unhex(beginning(hex(encode(text)), 1926))) || '…sha256:' || sha256(text)
        ELSE text
    END;

-- The time rule. Records without an append time belong to complete input: nothing in it is
-- late, and as_of stands in to judge the future.
CREATE TABLE records AS
SELECT
    * EXCLUDE (reason),
    CASE
        WHEN reason IS NOT NULL THEN 'invalid'
        WHEN event_us > coalesce(append_us, getvariable('as_of_us'))
            + getvariable('future_tolerance_us') THEN 'future'
        WHEN append_us IS NULL THEN 'on_time'
        WHEN event_us >= append_us - getvariable('out_of_orderness_us') THEN 'on_time'
        WHEN event_us >= append_us - getvariable('out_of_orderness_us')
            - getvariable('allowed_lateness_us') THEN 'late'
        ELSE 'too_late'
    END AS verdict,
    coalesce(reason, verdict) AS reason,
    -- What makes two records one event.
    CASE getvariable('dedupe')
        WHEN 'event_id' THEN
            CASE WHEN event_id IS NULL THEN {'payload': payload, 'id': NULL, 'us': NULL}
                ELSE {'payload': NULL, 'id': event_id, 'us': event_us} END
        WHEN 'payload' THEN {'payload': payload, 'id': NULL, 'us': NULL}
        ELSE {'payload': NULL, 'id': topic || ' ' || partition, 'us': "offset"}
    END AS identity
FROM judged;

CREATE TABLE accepted AS
SELECT row_number() OVER () AS event, user_id, page_url, event_type, event_id, event_us, verdict
FROM records
WHERE verdict IN ('on_time', 'late')
QUALIFY row_number() OVER (
    PARTITION BY identity ORDER BY append_us, topic, partition, "offset"
) = 1;

CREATE TABLE page_view_counts AS
WITH counted AS (
    SELECT
        floored(event_us, getvariable('window_us')) AS window_start,
        window_start + getvariable('window_us') AS window_end,
        page_url,
        count(*) AS views
    FROM accepted
    WHERE event_type = 'page_view'
    GROUP BY ALL
)
SELECT * REPLACE (shortened(page_url) AS page_url) FROM counted;

-- Which users each window holds, with how many events: a window starts at every multiple of
-- the period.
CREATE TABLE users_of_windows AS
WITH starts AS (
    SELECT
        user_id,
        event_us,
        unnest(range(
            floored(event_us, getvariable('users_period_us')),
            event_us - getvariable('users_window_us'),
            -getvariable('users_period_us')
        )) AS window_start
    FROM accepted
)
SELECT
    window_start,
    window_start + getvariable('users_window_us') AS window_end,
    user_id,
    count(*) AS events
FROM starts
GROUP BY ALL;

-- Sessions: a fold over each user's events, one after the other. The state is the session
-- that is open, if any, how many there were, and `places`: the number of the session that
-- each event so far belongs to; 0: none, as an end without an open session.
CREATE MACRO continues(state, event) AS
    state.is_open AND event.at - state.latest < getvariable('session_gap_us');

CREATE MACRO opens(state, event) AS
    CASE event.kind
        WHEN 'session_end' THEN false
        WHEN 'session_start' THEN NOT continues(state, event) OR state.began < event.at
        ELSE NOT continues(state, event)
    END;

CREATE TABLE placed AS
WITH in_order AS (
    SELECT
        user_id,
        list(
            {'number': event, 'at': event_us, 'kind': event_type}
            ORDER BY
                event_us,
                CASE event_type WHEN 'session_start' THEN 1 WHEN 'session_end' THEN 3 ELSE 2 END,
                event
        ) AS events
    FROM accepted
    GROUP BY user_id
), folded AS (
    SELECT
        events,
        list_reduce(
            events,
            lambda state, event: {
                'is_open': event.kind <> 'session_end',
                'began': CASE WHEN opens(state, event) THEN event.at ELSE state.began END,
                'latest': event.at,
                'sessions': state.sessions + opens(state, event)::BIGINT,
                'places': list_append(
                    state.places,
                    CASE
                        WHEN opens(state, event) THEN state.sessions + 1
                        WHEN continues(state, event) THEN state.sessions
                        ELSE 0
                    END
                )
            },
            {
                'is_open': false, 'began': 0::BIGINT, 'latest': 0::BIGINT,
                'sessions': 0::BIGINT, 'places': []::BIGINT[]
            }
        ).places AS places
    FROM in_order
), unnested AS (
    SELECT unnest(events).number AS event, unnest(places) AS session FROM folded
)
SELECT accepted.*, session FROM unnested JOIN accepted USING (event);

CREATE TABLE user_sessions AS
SELECT
    shortened(placed.user_id) AS user_id,
    min(event_us) AS session_start,
    max(event_us) AS session_end,
    (session_end - session_start) / 1e6 AS duration_s,
    count(*) FILTER (event_type = 'page_view') AS page_views,
    count(*) FILTER (event_type = 'click') AS clicks,
    CASE WHEN bool_or(event_type = 'session_end') THEN 'session_end' ELSE 'timeout' END AS ended_by
FROM placed
WHERE session > 0
GROUP BY placed.user_id, session;

CREATE VIEW lake AS
SELECT
    topic, partition, "offset", append_us, verdict,
    event_us, user_id, page_url, event_type, event_id,
    strftime(make_timestamp(event_us), '%Y-%m-%d') AS event_date
FROM records
WHERE verdict IN ('on_time', 'late', 'too_late');

CREATE VIEW events AS
SELECT event_us, user_id, page_url, event_type, event_id FROM accepted;

CREATE VIEW enriched AS
SELECT *, getvariable('as_of_us') AS processing_us FROM events;

CREATE VIEW events_by_user AS
SELECT * REPLACE (shortened(user_id) AS user_id) FROM events;

-- The same events in a topic, where they are published with the time of that moment.
CREATE VIEW published AS
SELECT
    event_us, shortened(user_id) AS user_id, shortened(page_url) AS page_url, event_type,
    shortened(event_id) AS event_id
FROM accepted;

CREATE VIEW dead_letters AS
SELECT
    topic, partition, "offset", append_us, payload,
    CASE verdict WHEN 'invalid' THEN 'parse' ELSE 'lateness' END AS stage,
    reason,
    -- Behind the watermark where positive, ahead of the append time where negative.
    CASE verdict
        WHEN 'future' THEN (coalesce(append_us, getvariable('as_of_us')) - event_us) / 1e6
        WHEN 'too_late' THEN (append_us - getvariable('out_of_orderness_us') - event_us) / 1e6
    END AS seconds_late
FROM records
WHERE verdict IN ('invalid', 'future', 'too_late');
