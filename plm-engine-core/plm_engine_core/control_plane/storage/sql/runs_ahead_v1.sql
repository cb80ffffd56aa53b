-- Runs whose times lie ahead, because the database's clock was ahead when it wrote them, and was set back since.

-- A lease is for a day at most, so one that goes on for longer was given by a clock that was ahead.
CREATE FUNCTION engine_is_ahead_v1(r run_states, p_patience double precision) RETURNS boolean
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.state IN ('queued', 'running') AND (r.updated_at > clock_timestamp() + make_interval(secs => p_patience)
        OR COALESCE(r.lease_expires_at > clock_timestamp() + make_interval(secs => 86400 + p_patience), false))
$$;

-- Ids only; whoever acts on them does so tenant by tenant under row-level security.
CREATE FUNCTION engine_runs_ahead_v1(p_limit integer, p_patience double precision)
RETURNS TABLE (tenant_id uuid, run_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.tenant_id, r.run_id FROM run_states AS r
        WHERE r.state IN ('queued', 'running') AND engine_is_ahead_v1(r, p_patience) LIMIT p_limit
$$;
