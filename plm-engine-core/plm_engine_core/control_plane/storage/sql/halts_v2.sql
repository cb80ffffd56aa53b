-- The halts above a proposal: system, tenant, agent, run group, run and capability, from wide to narrow.
-- A scope that a run does not have (no agent, no run group) is null and cannot be halted.

-- Shared locks on every halt scope above a proposal. A halt takes its own scope exclusively, so nothing that passed this
-- line can commit after a halt that has committed. The names are the contract with whoever triggers a halt.
CREATE FUNCTION engine_lock_halts_v2(p_tenant uuid, p_run uuid, p_group uuid, p_agent text, p_capability text)
RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/system', 0));
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/tenant/' || p_tenant, 0));
    -- Names of agents and capabilities are a tenant's own; a null name is no lock.
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/agent/' || p_tenant || '/' || p_agent, 0))
        WHERE p_agent IS NOT NULL;
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/run_group/' || p_group, 0)) WHERE p_group IS NOT NULL;
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/run/' || p_run, 0));
    PERFORM pg_advisory_xact_lock_shared(hashtextextended('halt/capability/' || p_tenant || '/' || p_capability, 0))
        WHERE p_capability IS NOT NULL;
END
$$;

-- The widest standing halt over a proposal, or null. Call it in a statement after engine_lock_halts_v2.
CREATE FUNCTION engine_standing_halt_v2(p_tenant uuid, p_run uuid, p_group uuid, p_agent text, p_capability text)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_halt jsonb;
BEGIN
    SELECT jsonb_build_object('id', id, 'scope', 'system', 'epoch', epoch, 'reason', reason) INTO v_halt
        FROM halts_system WHERE lifted_at IS NULL;
    IF FOUND THEN
        RETURN v_halt;
    END IF;
    SELECT jsonb_strip_nulls(jsonb_build_object(
            'id', id, 'scope', scope, 'epoch', epoch, 'reason', reason, 'subject', subject)) INTO v_halt
        FROM halts WHERE tenant_id = p_tenant AND lifted_at IS NULL AND (
            scope = 'tenant' OR (scope = 'agent' AND subject = p_agent) OR (scope = 'run_group' AND scope_id = p_group)
            OR (scope = 'run' AND scope_id = p_run) OR (scope = 'capability' AND subject = p_capability))
        ORDER BY array_position(ARRAY['tenant', 'agent', 'run_group', 'run', 'capability'], scope) LIMIT 1;
    RETURN v_halt;
END
$$;

-- How a halt refuses.
CREATE FUNCTION engine_halted_v2(p_halt jsonb) RETURNS jsonb
LANGUAGE sql IMMUTABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT jsonb_build_object('outcome', 'deny', 'reason', 'halted', 'halt', p_halt, 'rule', 'halt',
        'message', format('a %s halt stands: %s', p_halt ->> 'scope', p_halt ->> 'reason'),
        'unblock', format('lifting the halt %s', p_halt ->> 'id'))
$$;
