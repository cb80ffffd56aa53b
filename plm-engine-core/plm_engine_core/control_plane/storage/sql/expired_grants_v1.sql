-- Grants that ran out before their call began: what they hold comes back, also while somebody holds their run.

-- Runs that have one. Ids only; whoever acts on them does so tenant by tenant under row-level security.
CREATE FUNCTION engine_expired_grants_v1(p_limit integer)
RETURNS TABLE (tenant_id uuid, run_id uuid)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT r.tenant_id, r.run_id FROM run_states AS r
        WHERE r.state = 'running' AND EXISTS (SELECT FROM grants AS g
            WHERE g.tenant_id = r.tenant_id AND g.run_id = r.run_id
              AND g.state IN ('issued', 'revoked') AND g.expires_at <= clock_timestamp())
        ORDER BY r.updated_at LIMIT p_limit
$$;

-- Settles one as `not_started` for whoever holds the run; says whether it did. Whether it ran out is asked with the run
-- locked, which a begin takes first: either began before, and then this changes nothing, or it is refused from then on.
-- Locks in the order of settlement: run, grant, budgets from narrow to wide, stream head.
CREATE FUNCTION engine_expire_v1(c jsonb, p_ledger jsonb) RETURNS boolean
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id uuid := (c ->> 'run_id')::uuid;
    v_token  bigint;
BEGIN
    SELECT fencing_token INTO v_token FROM run_states
        WHERE tenant_id = v_tenant AND run_id = v_run_id AND state = 'running' FOR UPDATE;
    PERFORM FROM grants WHERE tenant_id = v_tenant AND id = (c ->> 'grant_id')::uuid AND run_id = v_run_id
        AND step_index = (c ->> 'step_index')::integer AND attempt = (c ->> 'attempt')::integer AND v_token IS NOT NULL
        AND state IN ('issued', 'revoked') AND expires_at <= clock_timestamp() FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    RETURN engine_settle_v7(c || jsonb_build_object('fencing_token', v_token, 'status', 'not_started'), p_ledger) IS NOT NULL;
END
$$;

-- Whether a grant ran out before its call began, and was closed for that: there is no other outcome, whoever says so first.
CREATE FUNCTION engine_ran_out_v1(g grants) RETURNS boolean
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT g.state = 'settled' AND g.outcome = 'not_started' AND g.begun_at IS NULL AND g.settled_at >= g.expires_at
$$;
