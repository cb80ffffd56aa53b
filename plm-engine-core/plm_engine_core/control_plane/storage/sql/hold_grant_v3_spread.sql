-- What nodes of the releases before call to close a grant, for grants that version 4 issued: it keeps the reservations of a
-- grant with the grant, they look for a row of each.

-- Gives a grant's reservations their rows, where they have none.
CREATE FUNCTION engine_spread_reservations_v1(p_tenant uuid, p_grant uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_grant grants;
BEGIN
    SELECT * INTO v_grant FROM grants WHERE tenant_id = p_tenant AND id = p_grant AND reserved IS NOT NULL FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    INSERT INTO reservations (tenant_id, grant_id, position, scope_kind, scope_id, unit, period, starts_at, amount, settled)
        SELECT p_tenant, p_grant, r.ord, r.scope_kind, r.scope_id, r.unit, COALESCE(r.period, 'total'), r.starts_at, r.amount,
               CASE WHEN v_grant.state = 'settled' THEN COALESCE((v_grant.charged ->> r.unit)::numeric, r.amount) END
        FROM ROWS FROM (jsonb_to_recordset(v_grant.reserved)
            AS (scope_kind text, scope_id uuid, unit text, period text, starts_at timestamptz, amount numeric))
            WITH ORDINALITY AS r (scope_kind, scope_id, unit, period, starts_at, amount, ord);
    UPDATE grants SET reserved = NULL WHERE tenant_id = p_tenant AND id = p_grant;
END
$$;

-- The contract of these two is as before.
CREATE OR REPLACE FUNCTION engine_hold_grant_v1(p_tenant uuid, p_run uuid, p_grant uuid, p_fencing bigint, p_digest text)
RETURNS grants
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_grant grants;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    SELECT * INTO v_grant FROM grants WHERE tenant_id = p_tenant AND id = p_grant AND run_id = p_run;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = p_grant;
    END IF;
    IF v_grant.state = 'settled' AND v_grant.outcome_digest = p_digest THEN
        PERFORM engine_spread_reservations_v1(p_tenant, p_grant);
        RETURN v_grant;
    END IF;
    PERFORM engine_hold_run_v1(p_tenant, p_run, p_fencing, false);
    SELECT * INTO v_grant FROM grants WHERE tenant_id = p_tenant AND id = p_grant FOR UPDATE;
    IF v_grant.state = 'settled' AND v_grant.outcome_digest <> p_digest THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'grant %s was already settled as %s', p_grant, v_grant.outcome);
    END IF;
    PERFORM engine_spread_reservations_v1(p_tenant, p_grant);
    RETURN v_grant;
END
$$;

CREATE OR REPLACE FUNCTION engine_hold_grant_v3(
    p_tenant uuid, p_run uuid, p_step integer, p_attempt integer, p_grant uuid, p_fencing bigint, p_digest text
) RETURNS grants
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_held  boolean;
    v_grant grants;
BEGIN
    SELECT fencing_token = p_fencing AND state = 'running' INTO v_held FROM run_states
        WHERE tenant_id = p_tenant AND run_id = p_run FOR UPDATE;
    SELECT * INTO v_grant FROM grants
        WHERE tenant_id = p_tenant AND id = p_grant AND run_id = p_run AND step_index = p_step AND attempt = p_attempt
        FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = p_grant;
    END IF;
    PERFORM engine_spread_reservations_v1(p_tenant, p_grant);
    IF v_grant.state = 'settled' AND v_grant.outcome_digest = p_digest THEN
        RETURN v_grant;
    END IF;
    IF v_held IS NOT TRUE THEN
        PERFORM engine_hold_run_v1(p_tenant, p_run, p_fencing, false);  -- says what is amiss
    END IF;
    IF v_grant.state = 'settled' THEN
        RAISE EXCEPTION USING ERRCODE = 'PLC01', MESSAGE = format(
            'grant %s was already settled as %s', p_grant, v_grant.outcome);
    END IF;
    RETURN v_grant;
END
$$;
