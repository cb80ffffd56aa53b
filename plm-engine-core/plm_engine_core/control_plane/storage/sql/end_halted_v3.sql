-- Ends what the standing halts of a tenant leave no room for: grants that were not used are revoked, calls in flight are
-- noted with the halt so that their end can be seen, approval scopes are over. Safe to repeat; a row that cannot be changed
-- keeps no other from being, approval scopes included. Answers how many could not be; nothing can begin under them all the
-- same while the halt stands.
CREATE FUNCTION engine_end_halted_v3(p_tenant uuid) RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_call    record;
    v_scope   record;
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
    FOR v_scope IN
        SELECT DISTINCT ON (a.id) a.id, h.triggered_by FROM approval_scopes AS a
        JOIN engine_standing_halts_v2(p_tenant) AS h ON h.scope IN ('system', 'tenant')
            OR (h.scope = 'agent' AND h.subject = a.agent) OR (h.scope = 'capability' AND h.subject = a.capability)
        WHERE a.tenant_id = p_tenant AND a.revoked_at IS NULL
        ORDER BY a.id
    LOOP
        BEGIN
            UPDATE approval_scopes SET revoked_at = clock_timestamp(), revoked_by = v_scope.triggered_by
                WHERE tenant_id = p_tenant AND id = v_scope.id AND revoked_at IS NULL;
        EXCEPTION WHEN OTHERS THEN
            v_damaged := v_damaged + 1;
        END;
    END LOOP;
    RETURN v_damaged;
END
$$;
