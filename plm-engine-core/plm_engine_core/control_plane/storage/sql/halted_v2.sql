-- What a halt does beyond standing: which one is over a run, and the grants, calls and approval scopes it ends.

-- The widest standing halt over a run as it is now, or null. It is over the capability of the run's last attempt too, while
-- that one is open, and when a halt is what refused it. With `p_lock` it stays as answered until the transaction ends; then
-- call it before the run is locked.
CREATE FUNCTION engine_run_halt_v2(p_tenant uuid, p_run uuid, p_lock boolean) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_group      uuid;
    v_agent      text;
    v_capability text;
BEGIN
    SELECT run_group_id, agent_id INTO v_group, v_agent FROM run_states WHERE tenant_id = p_tenant AND run_id = p_run;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    SELECT CASE WHEN s.state IN ('awaiting_approval', 'granted', 'running', 'not_started', 'cancelled', 'superseded')
                  OR s.error ->> 'reason' = 'halted' THEN s.capability END
        INTO v_capability FROM run_steps AS s WHERE s.tenant_id = p_tenant AND s.run_id = p_run
        ORDER BY s.step_index DESC, s.attempt DESC LIMIT 1;
    IF p_lock THEN
        PERFORM engine_lock_halts_v2(p_tenant, p_run, v_group, v_agent, v_capability);
    END IF;
    RETURN engine_standing_halt_v2(p_tenant, p_run, v_group, v_agent, v_capability);
END
$$;

-- Ends what the standing halts of a tenant leave no room for: grants that were not used are revoked, calls in flight are
-- noted with the halt so that their end can be seen, approval scopes are over. Safe to repeat; a row that cannot be changed
-- keeps no other from being. Answers how many could not be; nothing can begin under them all the same.
CREATE FUNCTION engine_end_halted_v2(p_tenant uuid) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_call    record;
    v_damaged integer := 0;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    FOR v_call IN
        SELECT h.id AS halt_id, g.id AS grant_id, g.state FROM run_states AS r
        JOIN grants AS g ON g.tenant_id = p_tenant AND g.run_id = r.run_id AND g.state IN ('issued', 'begun')
        JOIN run_steps AS s ON s.tenant_id = p_tenant AND s.run_id = g.run_id AND s.step_index = g.step_index
            AND s.attempt = g.attempt
        JOIN engine_standing_halts_v2(p_tenant) AS h ON h.scope IN ('system', 'tenant')
            OR (h.scope = 'agent' AND h.subject = r.agent_id) OR (h.scope = 'run_group' AND h.scope_id = r.run_group_id)
            OR (h.scope = 'run' AND h.scope_id = r.run_id) OR (h.scope = 'capability' AND h.subject = s.capability)
        WHERE r.tenant_id = p_tenant AND r.state = 'running'
    LOOP
        BEGIN
            INSERT INTO halt_calls (tenant_id, halt_id, grant_id, began)
                VALUES (p_tenant, v_call.halt_id, v_call.grant_id, v_call.state = 'begun') ON CONFLICT DO NOTHING;
            IF v_call.state = 'issued' THEN
                UPDATE grants SET state = 'revoked' WHERE tenant_id = p_tenant AND id = v_call.grant_id AND state = 'issued';
            END IF;
        EXCEPTION WHEN OTHERS THEN
            v_damaged := v_damaged + 1;
        END;
    END LOOP;
    UPDATE approval_scopes AS a SET revoked_at = clock_timestamp(), revoked_by = h.triggered_by
        FROM engine_standing_halts_v2(p_tenant) AS h
        WHERE a.tenant_id = p_tenant AND a.revoked_at IS NULL AND (h.scope IN ('system', 'tenant')
            OR (h.scope = 'agent' AND h.subject = a.agent) OR (h.scope = 'capability' AND h.subject = a.capability));
    RETURN v_damaged;
END
$$;

-- Every halt that stands over something of a tenant, those of the system included.
CREATE FUNCTION engine_standing_halts_v2(p_tenant uuid)
RETURNS TABLE (id uuid, scope text, scope_id uuid, subject text, triggered_by uuid)
LANGUAGE sql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT h.id, h.scope, h.scope_id, h.subject, h.triggered_by FROM halts AS h
        WHERE h.tenant_id = p_tenant AND h.lifted_at IS NULL
    UNION ALL SELECT s.id, 'system', NULL, NULL, s.triggered_by FROM halts_system AS s WHERE s.lifted_at IS NULL
$$;
