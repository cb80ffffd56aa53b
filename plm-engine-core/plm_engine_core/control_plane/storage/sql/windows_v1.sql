-- The windows of budgets. One that is counted in UTC has no recorded end and no zone, as in releases that knew no other.

-- The first moment of a local day; where a clock that is set forward leaves midnight out, when it is set.
-- Of a midnight that comes twice the database takes the second.
CREATE FUNCTION engine_midnight_v1(p_midnight timestamp, p_zone text) RETURNS timestamptz
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT CASE WHEN early.at < late.at AND early.at AT TIME ZONE p_zone = p_midnight THEN early.at ELSE late.at END
    FROM (SELECT p_midnight AT TIME ZONE p_zone AS at) AS late,
        LATERAL (SELECT late.at - interval '24 hours' AS at) AS before,
        LATERAL (SELECT (p_midnight - (before.at AT TIME ZONE p_zone - before.at AT TIME ZONE 'UTC')) AT TIME ZONE 'UTC' AS at)
            AS early
$$;

-- When the window that a moment lies in began, and when it ends. A zone that the database does not know is an error.
CREATE FUNCTION engine_window_of_v1(p_period text, p_zone text, p_at timestamptz)
RETURNS TABLE (starts_at timestamptz, ends_at timestamptz)
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT max(b.at) FILTER (WHERE b.at <= p_at), min(b.at) FILTER (WHERE b.at > p_at)
    FROM generate_series(-1, 2) AS beside, LATERAL (SELECT engine_midnight_v1(
        date_trunc(p_period, p_at AT TIME ZONE p_zone) + beside * ('1 ' || p_period)::interval, p_zone) AS at) AS b
$$;

-- Whether a window has begun and not ended.
CREATE FUNCTION engine_window_runs_v1(p_at timestamptz, p_period text, p_starts timestamptz, p_ends timestamptz) RETURNS boolean
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT p_starts <= p_at AND (p_period = 'total' OR p_at < COALESCE(p_ends,
        (p_starts AT TIME ZONE 'UTC' + ('1 ' || p_period)::interval) AT TIME ZONE 'UTC'))
$$;

-- When the window of a budget that runs began, in whichever zone it was opened; NULL where none runs.
CREATE FUNCTION engine_window_in_use_v1(p_tenant uuid, p_entry jsonb, p_at timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT starts_at FROM budgets
    WHERE tenant_id = p_tenant AND scope_kind = p_entry ->> 'scope_kind' AND scope_id = (p_entry ->> 'scope_id')::uuid
      AND unit = p_entry ->> 'unit' AND period = COALESCE(p_entry ->> 'period', 'total')
      AND (starts_at = to_timestamp(0) OR starts_at > p_at - interval '800 hours')
      AND engine_window_runs_v1(p_at, period, starts_at, ends_at)
    ORDER BY starts_at DESC LIMIT 1
$$;

-- Answers when the window that an entry falls in began, and opens it where none runs. While one runs nothing else is opened,
-- whatever the zone is now: so no change of zone gives a budget anew. Who opens one holds a lock, so that two who count in
-- different zones do not open two. The limit is that of `engine_open_budget_v2`. NULL: the database does not know the zone.
CREATE FUNCTION engine_open_window_v1(p_tenant uuid, p_entry jsonb) RETURNS timestamptz
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_period text := COALESCE(p_entry ->> 'period', 'total');
    v_zone   text := p_entry ->> 'time_zone';
    v_at     timestamptz := clock_timestamp();
    v_starts timestamptz;
    v_ends   timestamptz;
BEGIN
    IF v_period = 'total' THEN
        PERFORM engine_open_budget_v2(p_tenant, p_entry, to_timestamp(0));
        RETURN to_timestamp(0);
    END IF;
    v_starts := engine_window_in_use_v1(p_tenant, p_entry, v_at);
    IF v_starts IS NULL THEN
        PERFORM pg_advisory_xact_lock(hashtextextended(concat_ws('/', 'window', p_tenant, p_entry ->> 'scope_kind',
            p_entry ->> 'scope_id', p_entry ->> 'unit', v_period), 0));
        v_at := clock_timestamp();
        v_starts := engine_window_in_use_v1(p_tenant, p_entry, v_at);
    END IF;
    IF v_starts IS NOT NULL THEN
        PERFORM engine_open_budget_v2(p_tenant, p_entry, v_starts);
        RETURN v_starts;
    END IF;
    BEGIN
        SELECT w.starts_at, w.ends_at INTO v_starts, v_ends FROM engine_window_of_v1(v_period, COALESCE(v_zone, 'UTC'), v_at) AS w;
    EXCEPTION WHEN invalid_parameter_value THEN
        RETURN NULL;
    END;
    v_ends := CASE WHEN v_zone IS NOT NULL THEN v_ends END;
    PERFORM engine_open_budget_v2(p_tenant, p_entry, v_starts);
    -- A window of another zone that began at the same moment, and has ended, goes on as this one.
    UPDATE budgets SET time_zone = v_zone, ends_at = v_ends
        WHERE tenant_id = p_tenant AND scope_kind = p_entry ->> 'scope_kind' AND scope_id = (p_entry ->> 'scope_id')::uuid
          AND unit = p_entry ->> 'unit' AND period = v_period AND starts_at = v_starts
          AND (time_zone, ends_at) IS DISTINCT FROM (v_zone, v_ends);
    RETURN v_starts;
END
$$;

-- How a budget refuses whose window cannot be told.
CREATE FUNCTION engine_unknown_zone_v1(p_entry jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT jsonb_build_object('outcome', 'deny', 'reason', 'budget_missing', 'limit', jsonb_strip_nulls(jsonb_build_object(
            'scope', p_entry -> 'scope_kind', 'scope_id', p_entry -> 'scope_id', 'subject', p_entry -> 'subject',
            'unit', p_entry -> 'unit', 'period', p_entry -> 'period', 'time_zone', p_entry -> 'time_zone')),
        'rule', concat_ws('.', 'limits', p_entry ->> 'scope_kind', p_entry ->> 'period', p_entry ->> 'unit'),
        'message', format('the %s''s %s budget in %s cannot be opened: the storage knows no time zone %s',
            p_entry ->> 'scope_kind', p_entry ->> 'period', p_entry ->> 'unit', p_entry ->> 'time_zone'),
        'unblock', format('time zone data that know %s where the storage runs, or another time zone in the policy',
            p_entry ->> 'time_zone'))
$$;
